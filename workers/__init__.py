"""Who computes: decoder, engine, experts across ranks, and the Ray actors that hold them."""
