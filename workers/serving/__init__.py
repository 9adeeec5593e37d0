"""A served index: the actors that keep it loaded, how queries reach them, and who follows new versions of it."""
