//! Makes the collector of traces of what was decoded.

use http::HeaderValue;
use http::header::{HeaderMap, HeaderName};
use url::Url;

use super::Check;
use crate::config::leaf::{Parsed, Percent, ProviderUrl, Text};
use crate::config::locate::Spot;
use crate::config::schema::{self, Entries};
use crate::host::is_local;
use crate::secret::Secret;
use crate::traces::{Collector, Share};

/// Where OTLP has traces, below its endpoint.
const TRACES: &str = "/v1/traces";

impl Check<'_> {
    /// Where spans are sent, if they are.
    pub(super) fn traces(&mut self, spot: &Spot<'_>, written: Option<schema::Traces>) -> Option<Collector> {
        let schema::Traces { endpoint, sample, headers, resource } = written?;
        if !spot.key("endpoint").is_given() {
            self.refuse(spot, "`endpoint` is missing", "write where the collector is, as in `http://127.0.0.1:4318`");
        }
        let headers = self.collector_headers(&spot.key("headers"), headers);
        let Parsed(ProviderUrl(mut endpoint)) = endpoint?;
        self.collector(&spot.key("endpoint"), &endpoint, !headers.is_empty());
        if !endpoint.path().ends_with(TRACES) {
            endpoint.set_path(&format!("{}{TRACES}", endpoint.path().trim_end_matches('/')));
        }
        let share = sample.map_or(Share::ALL, |Parsed(Percent(share))| share);
        Some(Collector { endpoint, headers, share, resource: resource_of(resource) })
    }

    fn collector(&mut self, spot: &Spot<'_>, endpoint: &Url, has_headers: bool) {
        if endpoint.scheme() != "https" && has_headers && !is_local(endpoint) {
            self.refuse(spot, "with `http`, the `headers` can be read on the way", "use `https`");
        }
        if endpoint.query().is_some() {
            self.refuse(spot, "it has a query", "leave out everything from `?` on; a key goes into `headers`");
        }
    }

    fn collector_headers(&mut self, spot: &Spot<'_>, written: Option<Entries<Parsed<Secret>>>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let written = written.map(|entries| entries.0).unwrap_or_default();
        for (spot, (name, Parsed(value))) in spot.entries().zip(written) {
            self.warn_of_a_secret(&spot);
            let Ok(name) = HeaderName::try_from(name) else {
                self.refuse(&spot, "this is no name of a header", "write it as in `authorization`");
                continue;
            };
            // A secret has no control characters, and a field takes all others.
            if let Ok(mut value) = HeaderValue::from_str(value.expose()) {
                value.set_sensitive(true);
                headers.append(name, value);
            }
        }
        headers
    }
}

/// What is said of the sender. What is written takes the place of what we would say.
fn resource_of(written: Option<Entries<Parsed<Text>>>) -> Vec<(String, String)> {
    let written = written.map(|entries| entries.0).unwrap_or_default();
    let written: Vec<_> = written.into_iter().map(|(key, Parsed(Text(value)))| (key, value)).collect();
    let ours = [("service.name", "sidebearer"), ("service.version", env!("CARGO_PKG_VERSION"))];
    let ours = ours.into_iter().filter(|(key, _)| !written.iter().any(|(name, _)| name == key));
    ours.map(|(key, value)| (key.to_owned(), value.to_owned())).chain(written.iter().cloned()).collect()
}
