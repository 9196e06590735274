"""Routes of older services in their own shapes, each system in a module of its own, over the one service."""
