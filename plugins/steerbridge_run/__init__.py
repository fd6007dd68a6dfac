"""`steerbridge run -- COMMAND`: a steering package inside unmodified llama.cpp programs.

A preloaded library (`native/`) stands between a program and the llama.cpp that it loads; this
package looks at the program, starts it with that library, and reads what it tells.
"""
