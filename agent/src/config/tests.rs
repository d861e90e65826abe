//! Tests that valid files give the configured values and that invalid files give exactly these messages.

mod default_file;
mod document;
mod every_setting;
mod files;
mod picker;
mod pools;
mod printed;
mod renames;
mod routes;
mod sections;
mod shown;

use std::net::SocketAddr;

use super::*;

const POOL: &str = "[[pools]]\nname = \"a\"\nendpoints = [\"127.0.0.1:8000\"]\n";

fn pool() -> Pool {
    Pool::new("a", [address("127.0.0.1:8000")])
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn messages(text: &str) -> Vec<String> {
    let errors = Config::parse(text, "p.toml").expect_err(text);
    errors.iter().map(ToString::to_string).collect()
}

/// One error for one bad line, put in front of (a section) or after (keys of the pool) a good pool.
#[track_caller]
fn assert_message(text: &str, expected: &str) {
    assert_eq!(messages(text), [expected], "{text}");
}

#[test]
fn one_pool_alone_gives_defaults() {
    assert_eq!(Config::parse(POOL, "p.toml").unwrap(), Config::new(vec![pool()]));
}
