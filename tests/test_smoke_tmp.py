import jax, jax.numpy as jnp, ddpm_jax as ddpm
def test_a():
    s=ddpm.make_schedule()
    d=ddpm.make_denoiser(s, lambda x,t: x*0.1)
    x=ddpm.sample(jax.random.key(0), s, d, (2,4,4,1), num_steps=3)
    x=ddpm.sample(jax.random.split(jax.random.key(0)), s, d, (2,4,4,1), "ddim", num_steps=3, trajectory=True)
    assert x.shape==(4,2,4,4,1)
    u=ddpm.UNet(channels=8, multipliers=(1,2), num_res_blocks=1, num_groups=4, attention_resolutions=(4,), out_channels=1)
    xt=jnp.zeros((2,8,8,1)); t=jnp.zeros((2,),jnp.int32)
    p=u.init(jax.random.key(0), xt,t)["params"]
    u.apply({"params":p},xt,t,train=True,rngs={"dropout":jax.random.key(1)})
def test_b(tmp_path):
    c=ddpm.load_config("configs/fashion_mnist.py",{"train.num_steps":4,"train.batch_size":16,"model.channels":8,"model.multipliers":[1,1],"train.log_every_steps":2,"train.checkpoint_every_steps":2,"train.preview_images":4,"sample.num_steps":2})
    ddpm.train(c,tmp_path/"r")
    m=ddpm.load(tmp_path/"r")
    print(m.sample(3).shape)
