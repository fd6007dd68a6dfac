"""Prompt sets as people have them: files read, labels found, contents checked."""
