"""The words the services share: keys, wire structs, errors, and every atomic operation on Redis."""
