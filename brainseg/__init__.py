"""Code shared by the commands, torch.hub and the server."""
