"""From a checkpoint's weights to graph nodes, one straight-line function per architecture."""
