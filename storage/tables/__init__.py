"""Tables of a store, by what makes them; storage.schema has all of them by name."""
