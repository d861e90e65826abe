//! Tests of forms, whole and at every cut.

use proptest::prelude::*;

use super::*;

const TYPE: &str = "multipart/form-data; boundary=b-1";

/// What a form with these parts looks like, as fields and content.
fn form(parts: &[(&str, &str)]) -> String {
    let parts = parts.iter().map(|(fields, content)| format!("--b-1\r\n{fields}\r\n\r\n{content}\r\n"));
    parts.collect::<String>() + "--b-1--\r\n"
}

fn scanned(content_type: &str, body: &[u8], piece: usize) -> Result<Option<String>, FormError> {
    let mut scanner = FormScanner::new(content_type.as_bytes()).expect("a form");
    body.chunks(piece).try_for_each(|piece| scanner.feed(piece))?;
    Ok(scanner.model().map(str::to_owned))
}

/// The same at every cut.
fn model(body: &str) -> Result<Option<String>, FormError> {
    let whole = scanned(TYPE, body.as_bytes(), body.len());
    for piece in 1..body.len() {
        assert_eq!(scanned(TYPE, body.as_bytes(), piece), whole, "in pieces of {piece}: {body}");
    }
    whole
}

const FILE: (&str, &str) = (
    "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav",
    "\r\n--b-\r\n--b-1x\r\n\r\n\0",
);

#[test]
fn field_is_found_wherever_it_is_and_however_it_is_written() {
    let name = "Content-Disposition: form-data; name=\"model\"";
    let rows = [
        (form(&[(name, "whisper-1")]), Some("whisper-1")),
        (form(&[FILE, (name, "whisper-1")]), Some("whisper-1")),
        (form(&[(name, "whisper-1"), FILE]), Some("whisper-1")),
        (form(&[("content-disposition:form-data;name=model", "w")]), Some("w")),
        (
            form(&[(
                "Content-Type: text/plain\r\nCONTENT-DISPOSITION: Form-Data; x=\"a;name=b\"; name=\"mo\\del\"",
                "w",
            )]),
            Some("w"),
        ),
        (
            format!("a preamble\r\n{}an epilogue\r\n--b-1\r\n{name}\r\n\r\nx\r\n--b-1--", form(&[(name, "w")])),
            Some("w"),
        ),
        (form(&[(name, "w")]).replace("--b-1\r\n", "--b-1 \t\r\n"), Some("w")),
        (form(&[(name, "a b/é")]), Some("a b/é")),
        (form(&[(name, "")]), Some("")),
        // Not the field.
        (form(&[("Content-Disposition: form-data; name=\"model\"; filename=\"m\"", "w")]), None),
        (form(&[("Content-Disposition: form-data; name=\"models\"", "w")]), None),
        (form(&[("X: form-data; name=\"model\"", "w")]), None),
        (form(&[FILE, ("Content-Disposition: form-data; name=\"prompt\"", "name=\"model\"\r\n\r\nw")]), None),
        (
            form(&[("Content-Disposition: form-data; name=\"file\"; filename*=utf-8''model", "w"), (name, "m")]),
            Some("m"),
        ),
        (form(&[(name, &"x".repeat(MAX_MODEL))]), Some(&*"x".repeat(MAX_MODEL).leak())),
        (format!("--b-1\r\n{name}\r\n\r\nw"), None),
        (String::new() + "x", None),
    ];
    for (body, expected) in rows {
        let long = body.len() > 2000;
        let found = if long { scanned(TYPE, body.as_bytes(), 7) } else { model(&body) };
        assert_eq!(found, Ok(expected.map(str::to_owned)), "{body:?}");
    }
}

/// What servers read in different ways, in whole slices and byte by byte.
#[test]
fn model_in_doubt_is_an_error() {
    let name = "Content-Disposition: form-data; name=\"model\"";
    let long = "x".repeat(MAX_MODEL + 1);
    let rows = [
        (form(&[(name, "a"), (name, "a")]), FormError::Second),
        (form(&[(name, "a"), (name, &long), (name, "b")]), FormError::Second),
        (form(&[(name, &long)]), FormError::NoName),
        (form(&[(name, "a\tb"), (name, "b")]), FormError::NoName),
        (form(&[("Content-Disposition: attachment; name=\"model\"", "w")]), FormError::Ambiguous),
        (form(&[("Content-Disposition: form-data; name=\"x\"; name=\"model\"", "w")]), FormError::Ambiguous),
        (form(&[(&format!("Content-Disposition: form-data; name=\"x\"\r\n{name}"), "w")]), FormError::Ambiguous),
        (form(&[(&format!("{name}; filename*=x"), "w")]), FormError::Ambiguous),
        (form(&[("Content-Disposition: form-data; name*=utf-8''model", "w")]), FormError::Ambiguous),
        (form(&[("Content-Disposition: form-data;\r\n name=\"model\"", "a"), (name, "b")]), FormError::Second),
        (form(&[(&format!("X: {}", "x".repeat(MAX_FIELDS)), ""), (name, "w")]), FormError::Long),
        (
            form(&[(name, "w")]).replace("--b-1\r\n", &format!("--b-1{}\r\n", " ".repeat(MAX_PADDING + 1))),
            FormError::Long,
        ),
    ];
    for (body, error) in rows {
        for piece in [1, 7, 100, body.len()] {
            assert_eq!(scanned(TYPE, body.as_bytes(), piece), Err(error), "in pieces of {piece}: {body:?}");
        }
    }
    // Not UTF-8 in another field of the part.
    let body = [b"--b-1\r\nX: \xff\r\n", name.as_bytes(), b"\r\n\r\nw\r\n--b-1--"].concat();
    assert_eq!(scanned(TYPE, &body, 3), Ok(Some("w".to_owned())));
}

#[test]
fn content_type_has_to_be_a_form_with_a_boundary() {
    for wrong in [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=b",
        "application/json; boundary=b",
        "multipart/form-data; boundary=b; boundary=b-1",
        &format!("multipart/form-data; boundary={}", "b".repeat(MAX_BOUNDARY + 1)),
    ] {
        assert!(FormScanner::new(wrong.as_bytes()).is_none(), "{wrong}");
    }
    let body = form(&[("Content-Disposition: form-data; name=\"model\"", "w")]);
    for right in ["Multipart/Form-Data;Boundary=\"b-1\"", "multipart/form-data; charset=utf-8; boundary=b-1 ; a=b"] {
        assert_eq!(scanned(right, body.as_bytes(), 5), Ok(Some("w".to_owned())), "{right}");
    }
}

#[test]
fn query_names_one_model() {
    for (query, expected) in [
        ("model=gpt-4o-realtime", Some("gpt-4o-realtime")),
        ("a=b&model=org%2Fm%20x+y&c", Some("org/m x y")),
        ("models=a", None),
        ("model", None),
        ("model=", None),
        ("model=a&model=b", None),
        ("model=a&mod%65l=b", None),
        ("model&model=b", None),
        ("model=%ff", None),
        ("model=a%0ab", None),
    ] {
        assert_eq!(model_in_query(query).as_deref(), expected, "{query}");
    }
}

proptest! {
    /// Bytes of any kind in a file neither hide nor make a field.
    #[test]
    fn file_content_changes_nothing(content in "[\r\n\\-b1 -~]{0,200}", piece in 1_usize..40) {
        prop_assume!(!content.contains("\r\n--b-1") && !content.starts_with("--b-1"));
        let fields = "Content-Disposition: form-data; name=\"file\"; filename=\"f\"";
        let body = form(&[(fields, &content), ("Content-Disposition: form-data; name=\"model\"", "w")]);
        prop_assert_eq!(scanned(TYPE, body.as_bytes(), piece), Ok(Some("w".to_owned())));
    }
}

/// A part of another name may have whatever parameters it wants.
#[test]
fn extended_parameters_of_other_parts_are_no_doubt() {
    let part = |parameters: &str| form(&[(&format!("Content-Disposition: form-data; {parameters}"), "w")]);
    for other in [
        "name=\"x_model\"; filename*=utf-8\'\'a.wav",
        "name=\"base-model\"; filename=\"a\"; filename*=utf-8\'\'a",
        "name*=utf-8\'\'x_model",
        "name=\"a\"; filename*=utf-8\'\'model",
        "name*=utf-8\'en\'%6dodels",
    ] {
        assert_eq!(model(&part(other)), Ok(None), "{other}");
    }
    for doubtful in [
        "name=\"model\"; filename*=utf-8\'\'a.wav",
        "name=\"x_model\"; name*=utf-8\'\'model",
        "name*=utf-8\'en\'model",
        "name*=utf-8\'\'%6Dode%6c",
        "name*=model",
    ] {
        assert_eq!(model(&part(doubtful)), Err(FormError::Ambiguous), "{doubtful}");
    }
}

#[test]
fn boundary_is_found_whatever_bytes_the_type_has() {
    for (kind, boundary) in [
        (&b"multipart/form-data; boundary=b-1; x=\xe9"[..], &b"b-1"[..]),
        (b"multipart/form-data; x=\"\xc3\xa9\"; boundary=b-1", b"b-1"),
        (b"multipart/form-data; boundary=\xe9", b"\xe9"),
        (b"multipart/form-data; boundary=\xc3\xa9", b"\xc3\xa9"),
        (b"Multipart/Form-Data ;boundary=x\xc3\xa0 \t", b"x\xc3\xa0"),
        (b"multipart/form-data; boundary=\x85b\xa0; x=y", b"\x85b\xa0"),
    ] {
        let mut scanner = FormScanner::new(kind).expect("a form");
        let part = b"\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nw\r\n--";
        scanner.feed(&[&b"--"[..], boundary, part, boundary, b"--\r\n"].concat()).unwrap();
        assert_eq!(scanner.model(), Some("w"), "{kind:?}");
    }
}
