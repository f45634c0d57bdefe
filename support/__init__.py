"""What makes the scripts robust, fast and pretty. The method is not here."""
