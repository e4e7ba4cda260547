"""The endpoints that hosting services ask of a container, in front of the same API."""
