"""Methods against each other: what their runs came to, which learning rate to take, and the table of it all."""
