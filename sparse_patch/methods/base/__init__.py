"""What methods are made of: the protocol, the registry, and the bases that several methods share."""
