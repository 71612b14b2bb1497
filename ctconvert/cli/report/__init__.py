"""A checkpoint as a person looks at it: ``inspect --html`` and ``inspect --plot``."""
