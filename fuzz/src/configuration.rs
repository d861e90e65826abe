//! A configuration, and an endpoint file: no text makes the parsers panic, and each error names its line and fits on one line.
//!
//! Half of the inputs are used as they are; the others select lines of the default configuration, which reach more code than random
//! text.

use arbitrary::Unstructured;
use penstock_agent::config::{Config, EndpointsFormat, default_toml, parse_endpoints};

const LINES: usize = 48;
const VALUES: [&str; 20] = [
    "0",
    "1",
    "-1",
    "65536",
    "9223372036854775807",
    "1.5",
    "true",
    "\"\"",
    "\"off\"",
    "\"1s\"",
    "\"0s\"",
    "\"250ms\"",
    "\"99999999999h\"",
    "[]",
    "{}",
    "\"127.0.0.1:1\"",
    "\"[::1]:0\"",
    "[\"10.0.0.1:1\"]",
    "nan",
    "1979-05-27",
];

pub fn run(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let text = if kind & 1 == 0 {
        String::from_utf8_lossy(data).into_owned()
    } else {
        assembled(&mut Unstructured::new(data)).unwrap_or_default()
    };
    let lines = text.matches('\n').count() + 1;
    match Config::parse(&text, "penstock.toml") {
        Ok(config) => {
            assert!(!config.pools.is_empty(), "a configuration without a pool");
            assert_eq!(Config::parse(&text, "penstock.toml").as_ref(), Ok(&config));
        }
        Err(errors) => {
            assert!(errors.iter().next().is_some(), "rejected without an error");
            let mut before = 0;
            for error in errors.iter() {
                assert!((1..=lines).contains(&error.line()), "line {} of {lines}: {error}", error.line());
                assert!(error.line() >= before, "errors out of order");
                before = error.line();
                assert!(!error.to_string().contains('\n'), "an error with several lines: {error}");
            }
        }
    }
    let listen = ([127, 0, 0, 1], 8080).into();
    for format in [EndpointsFormat::Toml, EndpointsFormat::Json] {
        match parse_endpoints(&text, format, &[8000], listen) {
            Ok(endpoints) => assert!(endpoints.iter().all(|endpoint| endpoint.address.port() != 0)),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

/// Lines of the default configuration, some with other values, some reordered.
fn assembled(data: &mut Unstructured<'_>) -> arbitrary::Result<String> {
    let default = default_toml();
    let lines: Vec<&str> =
        default.lines().map(|line| line.trim_start_matches('#')).filter(|line| is_toml(line)).collect();
    let mut text = String::new();
    let mut at = 0;
    for _ in 0..LINES {
        if data.is_empty() {
            break;
        }
        at = if data.ratio(1, 3)? { data.choose_index(lines.len())? } else { (at + 1) % lines.len() };
        let line = lines[at];
        let written = match line.split_once('=') {
            Some((key, _)) if data.ratio(1, 4)? => format!("{key}= {}", data.choose(&VALUES)?),
            _ => line.to_owned(),
        };
        text.push_str(&written);
        text.push('\n');
    }
    Ok(text)
}

fn is_toml(line: &str) -> bool {
    line.starts_with('[') || line.split_once('=').is_some_and(|(key, _)| !key.trim().contains(' '))
}
