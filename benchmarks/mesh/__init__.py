"""Memory and traffic on meshes of devices."""
