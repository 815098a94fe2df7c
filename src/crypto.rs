//! The cryptography of TLS, the same on both sides.

use std::sync::{Arc, LazyLock};

use rustls::SupportedCipherSuite;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS13_AES_128_GCM_SHA256,
};
use rustls::crypto::aws_lc_rs::default_provider;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = default_provider();
    // False, and so first, for those that are preferred.
    provider.cipher_suites.sort_by_key(|suite| !PREFERRED.contains(suite));
    Arc::new(provider)
});

/// As browsers prefer them. A handshake hashes a lot, and processors have instructions for SHA-256 and not for SHA-384.
static PREFERRED: &[SupportedCipherSuite] =
    &[TLS13_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256];

/// What TLS is made of. It is made once.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// Seeds the source of randomness. Whoever needs some first waits for it otherwise, which with the jitter of the processor
/// as its source takes 40 ms.
pub fn warm_up() {
    let _ = provider().secure_random.fill(&mut [0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_suite_is_there_and_the_cheapest_of_each_kind_is_first() {
        let (mut all, suites) = (default_provider().cipher_suites, provider().cipher_suites.clone());
        assert_eq!(suites[..3], *PREFERRED);
        all.retain(|suite| !PREFERRED.contains(suite));
        assert_eq!(suites[3..], all);
    }
}
