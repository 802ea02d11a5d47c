"""Hard EM: (u, y) pairs → the plan z* of each that scores best, kept on disk between one search and
the next."""
