"""FX graph -> FX graph: recognisers that turn subgraphs into sites, the proof, and the rewrite into semantic ops."""
