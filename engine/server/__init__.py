"""What only Triton needs: finding it, the front before it, its supervisor, the repository's writer."""
