"""The coming sandbox: 128 pixels, things with parts that stand out of them."""
