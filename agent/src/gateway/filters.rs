//! Translates the filters of a rule.

use http::{HeaderName, HeaderValue};

use super::{
    objects::{HeaderModifier, HttpFilter, NamedValue, PathModifier, RequestRedirect, UrlRewrite},
    rule::{is_path, unknown},
};
use crate::config::{
    FieldChanges, PathChange, PathPattern, Redirect, RedirectScheme, RedirectStatus, Rewrite, SetField, may_be_changed,
};

/// What the filters of a rule do.
#[derive(Debug, Default)]
pub(super) struct Filters {
    pub(super) request_headers: FieldChanges,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) redirect: Option<Redirect>,
}

/// Why filters cannot be served.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FilterError {
    /// A filter or a value is not implemented.
    Unsupported(String),
    /// Two filters, or a filter and the match, exclude each other.
    Incompatible(String),
}

impl Filters {
    /// `path` is that of the match, and `port` that of the listener.
    pub(super) fn new(filters: &[HttpFilter], path: Option<&PathPattern>, port: u16) -> Result<Self, FilterError> {
        let mut found = Self::default();
        let mut seen = Vec::new();
        for filter in filters {
            if seen.contains(&&filter.kind) {
                return Err(FilterError::Incompatible(format!("has two filters of type {}", filter.kind)));
            }
            seen.push(&filter.kind);
            match (filter.kind.as_str(), filter) {
                ("RequestHeaderModifier", HttpFilter { request_header_modifier: Some(modifier), .. }) => {
                    found.request_headers = changes(modifier)?;
                }
                ("URLRewrite", HttpFilter { url_rewrite: Some(rewrite), .. }) => {
                    found.rewrite = Some(self::rewrite(rewrite, path)?);
                }
                ("RequestRedirect", HttpFilter { request_redirect: Some(redirect), .. }) => {
                    found.redirect = Some(self::redirect(redirect, path, port)?);
                }
                (kind, _) => {
                    return Err(FilterError::Unsupported(format!("filters of type {kind} are not implemented")));
                }
            }
        }
        if found.rewrite.is_some() && found.redirect.is_some() {
            return Err(FilterError::Incompatible("has both URLRewrite and RequestRedirect".to_owned()));
        }
        Ok(found)
    }
}

fn refuse_unknown(of: &str, other: &serde_json::Map<String, serde_json::Value>) -> Result<(), FilterError> {
    unknown(of, other).map_or(Ok(()), |why| Err(FilterError::Unsupported(why)))
}

fn changes(modifier: &HeaderModifier) -> Result<FieldChanges, FilterError> {
    refuse_unknown("requestHeaderModifier", &modifier.other)?;
    let remove = modifier.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?;
    Ok(FieldChanges { set: fields(&modifier.set)?, add: fields(&modifier.add)?, remove })
}

fn name(text: &str) -> Result<HeaderName, FilterError> {
    let name = HeaderName::from_bytes(text.as_bytes()).ok().filter(may_be_changed);
    let wrong = || format!("requestHeaderModifier: found {text:?}, expected a header that does not frame the message");
    name.ok_or_else(|| FilterError::Unsupported(wrong()))
}

/// Of equivalent names the first one counts.
fn fields(listed: &[NamedValue]) -> Result<Vec<SetField>, FilterError> {
    let mut fields: Vec<SetField> = Vec::new();
    for one in listed {
        let name = name(&one.name)?;
        if fields.iter().any(|known| known.name == name) {
            continue;
        }
        let value = HeaderValue::from_str(one.value.trim()).map_err(|_| {
            FilterError::Unsupported(format!("requestHeaderModifier: found the value {:?} of {name}", one.value))
        })?;
        fields.push(SetField { name, value });
    }
    Ok(fields)
}

fn rewrite(of: &UrlRewrite, matched: Option<&PathPattern>) -> Result<Rewrite, FilterError> {
    refuse_unknown("urlRewrite", &of.other)?;
    let path = of.path.as_ref().map(|path| path_change(path, matched)).transpose()?;
    Ok(Rewrite { host: given(of.hostname.as_ref()), path })
}

fn given(text: Option<&String>) -> Option<String> {
    text.filter(|text| !text.is_empty()).cloned()
}

fn redirect(of: &RequestRedirect, matched: Option<&PathPattern>, listener: u16) -> Result<Redirect, FilterError> {
    refuse_unknown("requestRedirect", &of.other)?;
    let scheme = match of.scheme.as_deref() {
        None | Some("") => None,
        Some("http") => Some(RedirectScheme::Http),
        Some("https") => Some(RedirectScheme::Https),
        Some(other) => {
            let why = format!("requestRedirect.scheme: found {other:?}, expected \"http\" or \"https\"");
            return Err(FilterError::Unsupported(why));
        }
    };
    let number = of.status_code.unwrap_or(302);
    let status = RedirectStatus::of(number).ok_or_else(|| {
        FilterError::Unsupported(format!(
            "requestRedirect.statusCode: found {number}, expected 301, 302, 303, 307 or 308"
        ))
    })?;
    Ok(Redirect {
        scheme,
        host: given(of.hostname.as_ref()),
        port: of.port.or(if scheme.is_none() { Some(listener) } else { None }),
        path: of.path.as_ref().map(|path| path_change(path, matched)).transpose()?,
        status,
    })
}

fn path_change(of: &PathModifier, matched: Option<&PathPattern>) -> Result<PathChange, FilterError> {
    let checked = |path: &str| {
        let wrong = || {
            FilterError::Unsupported(format!(
                "found the new path {path:?}, expected one of printable ASCII that starts with \"/\""
            ))
        };
        is_path(path).then(|| path.to_owned()).ok_or_else(wrong)
    };
    match (of.kind.as_str(), &of.replace_full_path, &of.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), _) if path.is_empty() => Ok(PathChange::Full("/".to_owned())),
        ("ReplaceFullPath", Some(path), _) => checked(path).map(PathChange::Full),
        ("ReplacePrefixMatch", _, Some(_)) if !matches!(matched, Some(PathPattern::Prefix(_))) => {
            Err(FilterError::Incompatible("replacePrefixMatch needs a match of type PathPrefix".to_owned()))
        }
        ("ReplacePrefixMatch", _, Some(path)) if path.is_empty() => Ok(PathChange::prefix("")),
        ("ReplacePrefixMatch", _, Some(path)) => checked(path).map(|path| PathChange::prefix(&path)),
        (kind, ..) => Err(FilterError::Unsupported(format!("a path modifier of type {kind} is not implemented"))),
    }
}
