"""`python -m steerbridge.cli`."""

from steerbridge.cli.app import main

main()
