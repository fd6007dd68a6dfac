"""`steerbridge run -- COMMAND`: steers unmodified llama.cpp programs.

A preloaded library (`native/`) intercepts the calls of a program to the llama.cpp that it loads;
this package inspects the program, starts it with that library, and reads the library's events.
"""
