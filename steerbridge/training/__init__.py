"""Training: pure maths on captured arrays, and the recipe that strings it together."""
