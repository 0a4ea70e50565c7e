"""How client updates become the next global adapter: means, server optimisers, the gate."""
