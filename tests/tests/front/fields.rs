//! Fields that the agent itself sets or changes, with HTTP/2 on either side.

use penstock_tests::{Plan, Request, eventually};

use crate::{
    SOON,
    scene::{Back, Front, Scene, first},
};

/// RFC 9110 §6.6.1 and §7.6.2, in each version of HTTP on either side.
#[tokio::test]
async fn date_and_max_forwards_are_handled_over_http2() {
    const DATE: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
    for (front, back) in [(Front::Http2, Back::Http1), (Front::Http1, Back::Http2), (Front::Http2, Back::Http2)] {
        let scene = Scene::with(front, back, first, |_| {}).await;
        for given in [None, Some(DATE)] {
            let headers = given.map(|date| ("date".to_owned(), date.to_owned())).into_iter().collect();
            let response = scene.request(&Plan { headers, ..Plan::default() }.request()).await;
            let found: Vec<_> = response.head.headers.iter().filter(|(name, _)| name == "date").collect();
            assert_eq!(found.len(), 1, "{front:?} {back:?}: {found:?}");
            assert!(found[0].1.ends_with(" GMT"), "{found:?}");
            assert_eq!(found[0].1 == DATE, given.is_some(), "{front:?} {back:?}: {found:?}");
        }
        let forwards = |method: &str, value: &str| Request::new(method, "/test/echo").header("max-forwards", value);
        for (method, given, seen) in [("OPTIONS", "1", "0"), ("OPTIONS", "10", "9"), ("GET", "0", "0")] {
            let echo = scene.request(&forwards(method, given)).await.echoed();
            assert_eq!(echo.header("max-forwards"), Some(seen), "{front:?} {back:?} {method}");
        }
        let before = scene.endpoint.requests();
        let response = scene.request(&forwards("OPTIONS", "0")).await;
        assert_eq!((response.status(), response.body.len()), (200, 0), "{front:?} {back:?}");
        assert_eq!(scene.endpoint.requests(), before, "{front:?} {back:?}");
        let counted = || scene.agent.count("penstock_requests_total", &["reason=\"max_forwards\""]);
        eventually(SOON, || counted() == 1).await;
    }
}
