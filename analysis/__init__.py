"""Mathematics over the tables of a store; knows no Ray and no model."""
