//! Errors of the whole file, and overrides.

use super::*;

#[test]
fn several_errors_are_reported_in_file_order() {
    let text =
        "[limits]\nhead_fields = 1\nhead = 2\n[timeouts]\ndrain = 3\n[[pools]]\nname = \"a\"\n[[routes]]\npool = \"b\"";
    let places: Vec<String> = messages(text).iter().map(|m| m.split(": found").next().unwrap().to_owned()).collect();
    let expected = [
        "p.toml:2:15: limits.head_fields",
        "p.toml:3:1: limits.head",
        "p.toml:5:9: timeouts.drain",
        "p.toml:6:1: pools[0].endpoints",
        "p.toml:9:1: routes[0].pool",
    ];
    assert_eq!(places, expected);
}

#[test]
fn invalid_toml_is_reported_with_position() {
    for (text, line, column) in [("[listen\n", 1, 8), ("[listen]\nworkers = \n", 2, 11), ("[a]\nb = 1\nb = 2\n", 3, 1)]
    {
        let message = &messages(text)[0];
        assert!(message.starts_with(&format!("p.toml:{line}:{column}: not valid TOML: ")), "{message}");
    }
}

#[test]
fn overrides_replace_settings_and_are_checked() {
    let overrides = Overrides {
        listen: Some("127.0.0.1:1".parse().unwrap()),
        admin: Some("127.0.0.1:2".parse().unwrap()),
        steering: Some(SteeringMode::Off),
        force: true,
        node: Some("n2".into()),
        zone: None,
        upgrade_socket: Some("/u.sock".into()),
    };
    let config = Config::parse_with(POOL, "p.toml", &overrides).unwrap();
    assert_eq!(config.listen.address.port(), 1);
    assert_eq!(config.admin.address.port(), 2);
    assert_eq!((config.steering.mode, config.steering.force), (SteeringMode::Off, true));
    assert_eq!(config.node, Node { name: Some("n2".into()), zone: None });
    assert_eq!(config.process.upgrade_socket, Some("/u.sock".into()));

    let colliding = Overrides { listen: Some("127.0.0.1:9901".parse().unwrap()), ..Overrides::default() };
    let errors = Config::parse_with(POOL, "p.toml", &colliding).unwrap_err();
    assert_eq!(
        errors.to_string(),
        "p.toml:1:1: admin.address: found 127.0.0.1:9901, expected another port than listen.address (127.0.0.1:9901)"
    );
}
