//! Who may do what.
//!
//! A request with a token of the namespace may do what the token's scopes allow. Without one, requests of this
//! machine may do everything, as long as the namespace has no token in force; all others are refused.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderMap, HeaderValue, Uri, header, request::Parts},
    middleware::Next,
    response::Response,
};
use governor::{
    DefaultKeyedRateLimiter, Quota,
    clock::{Clock as _, DefaultClock},
};
use nexus::client::{Scope, Token};
use uuid::Uuid;

use crate::{
    Service,
    problem::{Kind, Problem},
};

/// What stands before the routes of a scope.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) service: Arc<Service>,
    pub(crate) scope: Scope,
}

/// Who has come: with a token, or from this machine.
#[derive(Clone)]
pub(crate) struct Caller(pub(crate) Option<Token>);

impl Caller {
    /// The token's name.
    pub(crate) fn name(&self) -> Option<String> {
        self.0.as_ref().map(|token| token.name.clone())
    }
}

pub(crate) async fn check(
    State(gate): State<Gate>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let (mut parts, body) = request.into_parts();
    let token = gate.admit(&parts).await?;
    parts.extensions.insert(Caller(token));
    Ok(next.run(Request::from_parts(parts, body)).await)
}

impl Gate {
    async fn admit(&self, parts: &Parts) -> Result<Option<Token>, Problem> {
        let Some(authorization) = parts.headers.get(header::AUTHORIZATION) else {
            return self.admit_without_token(parts).await.map(|()| None);
        };
        let client = &self.service.client;
        let token = match bearer(authorization) {
            Some(shown) => client.token_of(shown).await?,
            None => None,
        };
        let Some(token) = token else {
            return Err(unauthenticated(
                "the token is not one that is in force in this namespace",
            ));
        };
        self.service.limiter.check(token.id)?;
        if !token.scopes.contains(&self.scope) {
            let needed = self.scope;
            let text = format!("Bearer error=\"insufficient_scope\", scope=\"{needed}\"");
            let problem = Problem::new(Kind::Scope, format!("this needs the scope `{needed}`"));
            return Err(match HeaderValue::try_from(text) {
                Ok(value) => problem.header(header::WWW_AUTHENTICATE, value),
                Err(_) => problem,
            });
        }
        Ok(Some(token))
    }

    async fn admit_without_token(&self, parts: &Parts) -> Result<(), Problem> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        if !peer.is_some_and(|peer| is_loopback(peer.0.ip())) {
            return Err(unauthenticated(
                "give a token: only this machine is served without one",
            ));
        }
        if let Err(why) = comes_from_here(&parts.uri, &parts.headers) {
            return Err(unauthenticated(&format!("give a token: {why}")));
        }
        if self.service.client.has_tokens().await? {
            return Err(unauthenticated(
                "give a token: the namespace has some, so nobody is served without one",
            ));
        }
        Ok(())
    }
}

fn unauthenticated(detail: &str) -> Problem {
    Problem::new(Kind::Unauthenticated, detail)
        .header(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
}

fn bearer(authorization: &HeaderValue) -> Option<&str> {
    let (scheme, token) = authorization.to_str().ok()?.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim_start_matches(' '))
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Whether a request over the loopback interface was meant for this server by a program of this machine. A proxy
/// passes on what comes from elsewhere, and a browser what a page of somebody else asks for, be it under a name
/// of its own that leads here.
fn comes_from_here(uri: &Uri, headers: &HeaderMap) -> Result<(), &'static str> {
    let is_passed_on = ["forwarded", "x-forwarded-for", "x-real-ip", "via"]
        .iter()
        .any(|name| headers.contains_key(*name));
    if is_passed_on {
        return Err("a proxy has passed this on");
    }
    let named = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    let host = uri
        .authority()
        .map(axum::http::uri::Authority::as_str)
        .or(named);
    if !host.is_some_and(names_loopback) {
        return Err("this machine was called by another name than `localhost`");
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let origin = origin.to_str().ok().and_then(|text| text.split_once("://"));
        if origin.map(|(_, origin)| origin) != host {
            return Err("a page of another server asks for this");
        }
    }
    Ok(())
}

/// Whether the host of an authority is this machine.
fn names_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(is_loopback)
}

/// How many requests each token may make. Only tokens in force are counted, so that there are no more of them
/// than somebody has made.
pub(crate) struct Limiter(DefaultKeyedRateLimiter<Uuid>);

impl Limiter {
    pub(crate) fn new(per_second: NonZeroU32) -> Self {
        Self(DefaultKeyedRateLimiter::keyed(Quota::per_second(
            per_second,
        )))
    }

    fn check(&self, token: Uuid) -> Result<(), Problem> {
        self.0.check_key(&token).map_err(|until| {
            let wait = until.wait_time_from(DefaultClock::default().now());
            let seconds = wait.as_secs() + 1;
            Problem::new(
                Kind::RateLimit,
                format!("come back in {seconds} s, and less often"),
            )
            .retry_after(seconds)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(host: &str, more: &[(&'static str, &str)]) -> Result<(), &'static str> {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        for (name, value) in more {
            headers.insert(*name, value.parse().unwrap());
        }
        comes_from_here(&Uri::from_static("/events"), &headers)
    }

    #[test]
    fn programs_of_this_machine_are_told_from_pages_and_proxies() {
        for host in [
            "localhost",
            "localhost:3000",
            "127.0.0.1:3000",
            "[::1]:3000",
            "LOCALHOST",
        ] {
            assert_eq!(request(host, &[]), Ok(()), "{host}");
        }
        let own = [("origin", "http://localhost:3000")];
        assert_eq!(request("localhost:3000", &own), Ok(()));
        for host in [
            "",
            "example.org",
            "localhost.example.org",
            "10.0.0.7:3000",
            "[::2]",
            "127.0.0.1.example.org",
        ] {
            assert!(request(host, &[]).is_err(), "{host}");
        }
        for foreign in [
            ("origin", "http://example.org"),
            ("origin", "null"),
            ("origin", "http://localhost:4000"),
            ("x-forwarded-for", "10.0.0.7"),
            ("forwarded", "for=10.0.0.7"),
        ] {
            assert!(
                request("localhost:3000", &[foreign]).is_err(),
                "{foreign:?}"
            );
        }
    }

    #[test]
    fn loopback_is_known_in_each_form() {
        for (address, is) in [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.1", false),
            ("::", false),
            ("0.0.0.0", false),
        ] {
            assert_eq!(is_loopback(address.parse().unwrap()), is, "{address}");
        }
    }
}
