"""Teachers and students: what goes into them and what is taken from them."""
