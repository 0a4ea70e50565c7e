"""Starting a site of a real federation: keys, checks, Flower's command lines. Knows how Flower is called and imports none of it."""
