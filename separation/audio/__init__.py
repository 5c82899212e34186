"""Songs on disk: decoded, checked, resampled, encoded."""
