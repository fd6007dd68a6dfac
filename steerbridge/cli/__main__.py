"""`python -m steerbridge.cli`."""

from steerbridge.cli import main

main()
