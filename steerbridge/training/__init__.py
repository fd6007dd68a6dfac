"""Training: mathematics on captured arrays, and the recipe that puts the steps together."""
