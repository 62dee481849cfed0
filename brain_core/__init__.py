"""What the database scripts of this project share."""
