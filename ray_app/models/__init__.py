"""Models of transformers: where they come from, where their neurons are, how they are run."""
