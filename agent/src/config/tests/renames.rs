//! Settings under their names from the previous version.

use super::*;

#[test]
fn old_names_are_accepted_with_warnings() {
    let text = "[limits]\nheaders = 16\ntotal_body_bytes = 7\n[bbr]\nheader = \"x-a\"\n[[pools]]\nname = \"a\"\n\
                endpoints = [\"127.0.0.1:8000\"]\n[pools.picker]\nkind = \"epp\"\naddress = \"e:1\"\n  header = \"x-b\"\n\
                limits = { bytes = 1024 }";
    let config = Config::parse(text, "p.toml").unwrap();
    assert_eq!((config.limits.headers, config.limits.total_body_bytes), (16, 7));
    assert_eq!(config.bbr.header, "x-a");
    let Picker::Epp(epp) = &config.pools[0].picker else { panic!("{config:?}") };
    assert_eq!((epp.header.as_str(), epp.limits.bytes), ("x-b", 1024));
    let warnings: Vec<String> = config.warnings.iter().map(ToString::to_string).collect();
    let end = "; the next version does not accept the old name";
    let expected = [
        "p.toml:2:1: limits.headers is now limits.head_fields",
        "p.toml:3:1: limits.total_body_bytes is now limits.total_body_memory_bytes",
        "p.toml:5:1: bbr.header is now bbr.model_header",
        "p.toml:12:3: pools[0].picker.header is now pools[0].picker.destination_header",
        "p.toml:13:12: pools[0].picker.limits.bytes is now pools[0].picker.limits.field_bytes",
    ];
    assert_eq!(warnings, expected.map(|warning| format!("{warning}{end}")));
}

#[test]
fn old_name_next_to_the_new_one_is_rejected() {
    assert_message(
        &format!("[limits]\nhead_fields = 16\nheaders = 17\n{POOL}"),
        "p.toml:3:1: limits.headers: found both limits.head_fields and this old name, expected limits.head_fields alone",
    );
}

#[test]
fn new_names_give_no_warnings() {
    assert_eq!(Config::parse(&default_toml(), "p.toml").unwrap().warnings, []);
}
