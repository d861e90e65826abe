//! The Date header (RFC 9110 §5.6.7), formatted once per second and thread.

use std::{
    cell::RefCell,
    time::{SystemTime, UNIX_EPOCH},
};

use http::HeaderValue;

/// The current date.
pub fn now() -> HeaderValue {
    thread_local! {
        static LAST: RefCell<Option<(u64, HeaderValue)>> = const { RefCell::new(None) };
    }
    let time = SystemTime::now();
    let second = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    LAST.with_borrow_mut(|last| match last {
        Some((of, value)) if *of == second => value.clone(),
        _ => {
            let value = value(time);
            *last = Some((second, value.clone()));
            value
        }
    })
}

fn value(time: SystemTime) -> HeaderValue {
    let value = HeaderValue::from_str(&httpdate::fmt_http_date(time));
    // A date is always plain ASCII, so the fallback is unreachable.
    value.unwrap_or(HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn date_has_the_form_of_http() {
        assert_eq!(value(UNIX_EPOCH + Duration::from_secs(784_111_777)), "Sun, 06 Nov 1994 08:49:37 GMT");
        let parsed = httpdate::parse_http_date(now().to_str().unwrap()).unwrap();
        assert!(SystemTime::now().duration_since(parsed).unwrap() < Duration::from_secs(60));
    }
}
