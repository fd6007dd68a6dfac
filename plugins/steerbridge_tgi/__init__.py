"""Steerbridge for text-generation-inference: steers its unmodified server.

    steerbridge run --package guard.gguf -- text-generation-launcher --model-id M

The wheel puts `steerbridge_tgi.pth` into the server's environment. Where STEERBRIDGE_PACKAGE is
set, each Python then waits for the server to be imported (`hook`) and attaches the package to the
loaded model (`attach`). torch is not imported before that.
"""
