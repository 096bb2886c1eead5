//! Attention from the projections on: its kernels and the norm's leave the gradients of q, k and v side by side in one
//! matrix, so that those of the projections are one product without a copy.

use super::cuda::Cuda;
use super::tensor::{empty, primitive, tensor};
use super::{cuda_attention, cuda_qk_norm, views};
use crate::ops::QkNormOps;
use crate::ops::attention::{Attended, Mask};
use crate::ops::normed_attention::{NormedAttentionOps, apart};
use crate::ops::qk_norm::QkNorm;
use burn::tensor::Tensor;
use burn_cubecl::tensor::CubeTensor;
use cubecl::zspace::metadata::Metadata;

impl NormedAttentionOps for Cuda {
    fn normed_attention_backward(
        [q, k]: [Tensor<Self, 2>; 2],
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        how: &QkNorm<Self>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> [Tensor<Self, 2>; 3] {
        let ([rows, of_q], [_, of_k], shape) = (q.dims(), k.dims(), attended.v.dims());
        let [batch, time, groups, size] = shape;
        if batch * time != rows || groups * size != of_k {
            return apart([q, k], attended, grad, how, mask, scale);
        }
        let side = empty(&primitive(q.clone()), [rows, of_q + 2 * of_k], q.dtype());
        let rows_of_v = views::columns(&side, of_q + of_k, of_k);
        let pitch = rows_of_v.meta.strides()[0];
        let meta = Metadata::new(shape, [time * pitch, pitch, size, 1]);
        let place = CubeTensor { meta: Box::new(meta), ..rows_of_v.clone() };
        let Some([grad_q, grad_k, _]) =
            cuda_attention::backward_into(&attended, &grad, mask, scale, Some(place))
        else {
            return apart([q, k], attended, grad, how, mask, scale);
        };
        let [grad_q, grad_k] = [grad_q, grad_k].map(tensor);
        let places = [views::columns(&side, 0, of_q), views::columns(&side, of_q, of_k)];
        let [grad_q, grad_k] =
            match cuda_qk_norm::backward_into(&q, &k, [&grad_q, &grad_k], how, Some(places)) {
                Some(grads) => grads.map(tensor),
                None => Self::qk_norm_backward(q, k, [grad_q, grad_k], how),
            };
        [grad_q, grad_k, tensor(rows_of_v)]
    }
}
