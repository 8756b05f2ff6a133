"""Running models with neurons removed, and measuring what that costs them."""
