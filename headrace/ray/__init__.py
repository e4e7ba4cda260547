"""Headrace on Ray: processes as actors, and an actor that asks for workers. Needs `pip install headrace[ray]`."""
