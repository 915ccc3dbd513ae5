"""From and to the checkpoints of others, in a stream and with a receipt."""
