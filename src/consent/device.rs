//! A consent on another device (RFC 8628): shows a code, and asks the provider until the user has decided.

use tokio::time::Instant;

use super::{Consent, ConsentError, Finished, Plan};
use crate::oauth::device::{self, Authorization, Poll};
use crate::oauth::{grant, wire};
use crate::tokens::{GrantError, Proof};

impl Consent {
    /// Begins: what the user is to be shown.
    ///
    /// # Errors
    /// When the provider offers no device flow, or none to this client.
    pub async fn device(&self, plan: &Plan) -> Result<Authorization, ConsentError> {
        let tokens = &self.inner.parts.tokens;
        let endpoint =
            tokens.device_authorization_endpoint(&plan.provider.name).await.map_err(ConsentError::Nowhere)?;
        let request = grant::device_authorization(&plan.provider, &endpoint, &plan.scopes);
        let reply = tokens.post(request).await.map_err(|error| ConsentError::Nowhere(error.to_string()))?;
        device::read(reply.status, &reply.body).map_err(ConsentError::Nowhere)
    }

    /// Asks until the user has decided, as often as the provider wants it and no more.
    ///
    /// # Errors
    /// When the user refuses, takes too long, or the provider fails for good.
    pub async fn await_device(&self, plan: &Plan, authorization: &Authorization) -> Result<Finished, ConsentError> {
        let until = Instant::now() + authorization.expires_in;
        let mut interval = authorization.interval;
        loop {
            tokio::time::sleep_until(until.min(Instant::now() + interval)).await;
            if Instant::now() >= until {
                return Err(ConsentError::CodeExpired);
            }
            let proof = Proof::DeviceCode(authorization.device_code.clone());
            let (tokens, provider) = (&self.inner.parts.tokens, &plan.provider.name);
            let failure: wire::Failure = match tokens.grant(provider, &plan.user, proof, plan.further.clone()).await {
                Ok(granted) => {
                    let (provider, user) = (plan.provider.clone(), plan.user.clone());
                    return Ok(Finished { provider, user, granted: Some(granted), return_to: None });
                }
                Err(GrantError::Provider(failure)) => failure,
                Err(other) => return Err(other.into()),
            };
            match device::poll(&failure) {
                Poll::Denied => {
                    let error = "access_denied".to_owned();
                    return Err(ConsentError::Refused { error, description: None, return_to: None });
                }
                Poll::Expired => return Err(ConsentError::CodeExpired),
                Poll::Failed => return Err(GrantError::Provider(failure).into()),
                wait => interval = device::next_interval(interval, wait).unwrap_or(interval),
            }
        }
    }
}
