"""One kind of input file a module: how its rows are counted at planning time, found again by position, and read."""
