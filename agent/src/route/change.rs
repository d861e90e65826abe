//! What a route changes in a request, and where it redirects one. Pure functions over the head of a request.

use http::{
    HeaderValue, StatusCode, Uri, header, request,
    uri::{PathAndQuery, Scheme},
};

use super::without_port;
use crate::config::{self, FieldChanges, PathChange, PathPattern, Redirect, SetField};

/// The changes of a route, at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteChanges {
    host: Option<HeaderValue>,
    path: Option<CompiledPathChange>,
    fields: FieldChanges,
}

/// Where a route redirects its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectTo {
    settings: Redirect,
    path: Option<CompiledPathChange>,
}

/// A change of the path, with the prefix that the route matches.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CompiledPathChange {
    change: PathChange,
    prefix: String,
}

/// The rewritten target is longer than a target may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetTooLong;

impl RouteChanges {
    /// The changes of this route. `None` if there are none.
    pub(super) fn of(route: &config::Route) -> Option<Self> {
        let rewrite = route.rewrite.as_ref();
        let changes = Self {
            host: rewrite.and_then(|rewrite| HeaderValue::from_str(rewrite.host.as_ref()?).ok()),
            path: rewrite.and_then(|rewrite| Some(CompiledPathChange::new(rewrite.path.as_ref()?, route))),
            fields: route.request_headers.clone(),
        };
        let has_fields = changes.fields != FieldChanges::default();
        (changes.host.is_some() || changes.path.is_some() || has_fields).then_some(changes)
    }

    /// Changes the request.
    pub fn apply(&self, request: &mut request::Parts) -> Result<(), TargetTooLong> {
        if let Some(host) = &self.host {
            request.headers.insert(header::HOST, host.clone());
        }
        if let Some(path) = &self.path {
            request.uri = path.rewritten(&request.uri)?;
        }
        let FieldChanges { set, add, remove } = &self.fields;
        // Each fails only if there are tens of thousands of fields, more than a head can have.
        for SetField { name, value } in set {
            let _ = request.headers.try_insert(name, value.clone());
        }
        for SetField { name, value } in add {
            let _ = request.headers.try_append(name, value.clone());
        }
        for name in remove {
            request.headers.remove(name);
        }
        Ok(())
    }
}

impl CompiledPathChange {
    fn new(change: &PathChange, route: &config::Route) -> Self {
        let prefix = match &route.path {
            Some(PathPattern::Prefix(prefix)) => prefix.clone(),
            Some(PathPattern::Exact(_)) | None => String::new(),
        };
        Self { change: change.clone(), prefix }
    }

    /// The path instead of this one, which the route matches. `*` stays.
    fn path(&self, path: &str) -> String {
        let changed = match &self.change {
            _ if !path.starts_with('/') => path.to_owned(),
            PathChange::Full(path) => path.clone(),
            PathChange::Prefix(replacement) => {
                format!("{replacement}{}", path.strip_prefix(self.prefix.as_str()).unwrap_or(path))
            }
        };
        if changed.is_empty() { "/".to_owned() } else { changed }
    }

    fn rewritten(&self, uri: &Uri) -> Result<Uri, TargetTooLong> {
        let path = self.path(uri.path());
        let target = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let target = PathAndQuery::try_from(target).map_err(|_| TargetTooLong)?;
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(target);
        Uri::from_parts(parts).map_err(|_| TargetTooLong)
    }
}

impl RedirectTo {
    /// The redirect of this route. `None` if it has none.
    pub(super) fn of(route: &config::Route) -> Option<Self> {
        let settings = route.redirect.clone()?;
        let path = settings.path.as_ref().map(|path| CompiledPathChange::new(path, route));
        Some(Self { settings, path })
    }

    pub fn status(&self) -> StatusCode {
        self.settings.status.code()
    }

    /// The URL to which this request is redirected, or its path alone if it has no host.
    pub fn location(&self, request: &request::Parts) -> HeaderValue {
        HeaderValue::try_from(self.url(request)).unwrap_or(HeaderValue::from_static("/"))
    }

    fn url(&self, request: &request::Parts) -> String {
        let Redirect { scheme, host, port, .. } = &self.settings;
        let is_tls = request.extensions.get::<Scheme>() == Some(&Scheme::HTTPS);
        let own = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let named = scheme.map(config::RedirectScheme::as_str);
        let scheme = named.unwrap_or(if is_tls { "https" } else { "http" });
        let port = port.or_else(|| if named.is_some() { None } else { port_of(own) });
        let path = match &self.path {
            Some(path) => path.path(request.uri.path()),
            None => request.uri.path().to_owned(),
        };
        let path = if path.starts_with('/') { path } else { "/".to_owned() };
        let query = request.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let host = host.as_deref().unwrap_or(without_port(own));
        if host.is_empty() {
            // Two slashes would begin a host.
            return format!("/{}{query}", path.trim_start_matches('/'));
        }
        let port = match (scheme, port) {
            ("http", Some(80)) | ("https", Some(443)) | (_, None) => String::new(),
            (_, Some(port)) => format!(":{port}"),
        };
        format!("{scheme}://{host}{port}{path}{query}")
    }
}

/// The port of `host[:port]`.
fn port_of(host: &str) -> Option<u16> {
    host.rsplit_once(':')?.1.parse().ok()
}

#[cfg(test)]
mod tests;
