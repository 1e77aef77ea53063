"""What steps run on: the processor, and the native libraries, each of which is proven by a real call in a child."""
