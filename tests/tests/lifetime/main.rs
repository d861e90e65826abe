//! What an agent lives through: another configuration while it runs, and its end.

mod killed;
mod reload;
