//! Files that a configuration names.

use super::*;

/// What `penstock config check` says about a client's certificate and key.
#[test]
fn client_certificate_is_checked_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let (path, write) = (folder.path().join("penstock.toml"), |name: &str, text: &str| {
        std::fs::write(folder.path().join(name), text).unwrap();
    });
    write(
        "penstock.toml",
        &format!(
            "{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ntls = \"insecure\"\nclient_cert_file = \"c.pem\"\nclient_key_file = \"c.key\"\n"
        ),
    );
    let wrong = || {
        Config::load(&path)
            .unwrap_err()
            .iter()
            .map(|error| error.to_string().split(": found").next().unwrap().rsplit('.').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(wrong(), ["client_cert_file", "client_key_file"]);
    let made = || rcgen::generate_simple_self_signed(["c".to_owned()]).unwrap();
    let (one, other) = (made(), made());
    write("c.pem", &one.cert.pem());
    write("c.key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    assert_eq!(wrong(), ["client_key_file"]);
    write("c.key", &other.signing_key.serialize_pem());
    assert_eq!(wrong(), ["client_key_file"], "another's");
    write("c.key", &one.signing_key.serialize_pem());
    let config = Config::load(&path).unwrap();
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    let in_folder = |name: &str| folder.path().join(name);
    let expected = ClientCertificate { certificate: in_folder("c.pem"), key: in_folder("c.key") };
    assert_eq!(epp.client_certificate, Some(expected));
}

#[test]
fn certificate_of_listener_is_checked_with_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("penstock.toml");
    let tls = "[listen.tls]\naddress = \"127.0.0.1:1\"\ncert_file = \"c.pem\"\nkey_file = \"c.key\"\n";
    std::fs::write(&path, format!("{tls}{POOL}")).unwrap();
    let wrong = || {
        let errors = Config::load(&path).unwrap_err();
        errors.iter().map(ConfigError::line).collect::<Vec<_>>()
    };
    assert_eq!(wrong(), [3, 4]);
    let certificate = rcgen::generate_simple_self_signed(["c".to_owned()]).unwrap();
    std::fs::write(folder.path().join("c.pem"), certificate.cert.pem()).unwrap();
    assert_eq!(wrong(), [4]);
    std::fs::write(folder.path().join("c.key"), certificate.signing_key.serialize_pem()).unwrap();
    assert!(Config::load(&path).is_ok());
}

#[test]
fn relative_files_are_found_next_to_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("penstock.toml");
    let ca = folder.path().join("ca.pem");
    let tls = format!("{POOL}[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\ntls = \"ca\"\nca_file = \"ca.pem\"\n");
    std::fs::write(&path, tls).unwrap();

    let text = std::fs::read_to_string(&path).unwrap();
    assert!(Config::parse(&text, "p.toml").is_ok(), "parsing opens no files");
    let error = Config::load(&path).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("{}:8:1: pools[0].picker.ca_file: found {} (", path.display(), ca.display())),
        "{error}"
    );
    assert!(error.ends_with("), expected a PEM file with a certificate"), "{error}");

    std::fs::write(&ca, "not a certificate").unwrap();
    assert!(Config::load(&path).is_err());

    let certificate = rcgen::generate_simple_self_signed(["e".to_owned()]).unwrap();
    std::fs::write(&ca, certificate.cert.pem()).unwrap();
    let config = Config::load(&path).unwrap();
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    assert_eq!(epp.tls, ServerTls::Ca(ca));

    let missing = folder.path().join("missing.toml");
    let error = Config::load(&missing).unwrap_err().to_string();
    assert!(error.starts_with(&format!("{}: cannot be read: ", missing.display())), "{error}");
}

fn endpoints_file(text: &str, name: &str) -> Result<Vec<ListedEndpoint>, String> {
    let (format, listen) = (EndpointsFormat::of(Path::new(name)), address("10.0.0.9:8080"));
    parse_endpoints(text, format, &[8000, 8001], listen).map_err(|error| error.to_string())
}

#[test]
fn endpoints_files_in_toml_and_json_give_the_same() {
    let toml = r#"endpoints = ["10.0.0.1", "[fd00::1]:80",
        { address = "10.0.0.2:80", node = "n1", zone = "", draining = true }]"#;
    let tables = "[[endpoints]]\naddress = \"10.0.0.1\"\n[[endpoints]]\naddress = \"[fd00::1]:80\"\n\
                  [[endpoints]]\naddress = \"10.0.0.2:80\"\nnode = \"n1\"\ndraining = true";
    let json = r#"{"endpoints": ["10.0.0.1", "[fd00::1]:80",
        {"address": "10.0.0.2:80", "node": "n1", "zone": null, "draining": true}]}"#;
    let last = ListedEndpoint { node: Some("n1".into()), draining: true, ..address("10.0.0.2:80").into() };
    let mut expected: Vec<ListedEndpoint> =
        ["10.0.0.1:8000", "10.0.0.1:8001", "[fd00::1]:80"].map(|a| address(a).into()).into();
    expected.push(last);
    for (text, name) in [(toml, "e.toml"), (tables, "endpoints"), (json, "e.JSON")] {
        assert_eq!(endpoints_file(text, name).as_ref(), Ok(&expected), "{name}");
    }
    for (text, name) in [("endpoints = []", "e.toml"), (r#"{"endpoints": []}"#, "e.json")] {
        assert_eq!(endpoints_file(text, name), Ok(vec![]), "{name}");
    }
}

#[test]
fn wrong_endpoints_files_are_rejected() {
    let cases = [
        ("e.toml", "", "line 1: missing field `endpoints`"),
        ("e.toml", "endpoints = [\n\"10.0.0.1:80\",\n", "line 2: unclosed array, expected `]`"),
        (
            "e.toml",
            "\nendpoints = [{ address = \"10.0.0.1:80\", weight = 1 }]",
            r#"line 2: "ip:port" or { address = "ip:port", node = "n1", zone = "a", draining = false }"#,
        ),
        (
            "e.json",
            r#"{"endpoints": [5]}"#,
            r#""ip:port" or { address = "ip:port", node = "n1", zone = "a", draining = false } at line 1 column 17"#,
        ),
        ("e.json", r#"{"endpoints": ["10.0.0.1:80"]"#, "EOF while parsing an object at line 1 column 29"),
        ("e.json", r#"{"endpoint": []}"#, "unknown field `endpoint`, expected `endpoints` at line 1 column 11"),
        (
            "e.json",
            r#"{"endpoints": ["10.0.0.1:80", "model:80"]}"#,
            r#"endpoints[1]: found "model:80", expected ip:port of a server, or ip where the pool has ports"#,
        ),
        (
            "e.toml",
            r#"endpoints = ["10.0.0.9:8080"]"#,
            r#"endpoints[0]: found "10.0.0.9:8080", expected another server than listen.address (10.0.0.9:8080)"#,
        ),
    ];
    for (name, text, expected) in cases {
        assert_eq!(endpoints_file(text, name), Err(expected.to_owned()), "{text}");
    }
}
