"""The service of a store: SQL, neuron pages and jobs over HTTP, for people who share it."""
