"""Programs that measure what MoRA costs."""
